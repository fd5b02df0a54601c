"""How a cell runs: the flow, what compressions and evaluators work on, trainings."""
