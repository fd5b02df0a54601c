"""Answer 1 of a method: which error is measured. One file an answer.

A metric is a pure function of the statistics of a linear's inputs and output gradients. It returns the pair
(C, R) of the weighted error ``‖R^½ (W − W') C^½‖_F``, each ``None`` (identity), a vector (diagonal) or a matrix.
The modules import no torch, so that a finished cell is recognised without loading it.
"""
