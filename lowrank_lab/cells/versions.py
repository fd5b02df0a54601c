"""Versions of the components that compute numbers. Keys of artifacts and records contain them.

Raise one when a change of the component changes its results: old artifacts are then not used any more.
Refactoring, speed and logging do not count. Library versions are written into every record instead.
"""

from collections.abc import Iterable

MODEL = 1  # models/load.py, tiny.py
GGUF = (
    2  # models/gguf_conversion.py, gguf_tokenizer.py, only for models from GGUF files; records of 1 do not have it
)
TOKENS = 1  # calibration/tokens.py
ONNX = 1  # models/onnx_conversion.py, only for models from ONNX files
IMAGES = 1  # calibration/images.py, image_corpora.py, only for models of images
IMAGE_TEXTS = 1  # calibration/image_texts.py, question_corpora.py, only for models of images and text
STATISTICS = 1  # calibration/statistics.py
GRADIENTS = 1  # calibration/gradients.py
SPECTRA = 1  # lowrank/solver.py, lowrank/spectra.py, metric/
COMPRESSION = 1  # allocation/, refinement/, storage/, training.py, the rest of lowrank/
QUANTIZATION = 2  # quantization/
PERPLEXITY = 1  # evaluation/perplexity.py
SPEED = 1  # evaluation/speed.py, macs.py
IMAGE_SPEED = 1  # evaluation/image_speed.py
GENERATION = 1  # evaluation/generation.py
OUTPUT_ERROR = 1  # evaluation/output_error.py
TRUNCATION = 1  # evaluation/truncation.py
LEARNED_RANKS = 1  # evaluation/learned_ranks.py
TRUNCATED_ACTIVATIONS = 1  # evaluation/truncated_activations.py
PERTURBED_RANKS = 1  # evaluation/perturbed_ranks.py
FACTORS = 1  # evaluation/factors.py
IPCA_MEMORY = 1  # evaluation/ipca_memory.py
HEAD_VALUES = 1  # evaluation/head_values.py
TOP1 = 1  # evaluation/top1.py
QUESTIONS = 1  # evaluation/questions.py
LOOK_UP = 1  # evaluation/look_up.py, modules/look_up.py
HARNESS = 2  # evaluation/harness.py, lm.py, tasks.py, task_data.py
RECORD = 3  # the schema of results.py

EVALUATORS = (
    "PERPLEXITY",
    "SPEED",
    "IMAGE_SPEED",
    "GENERATION",
    "OUTPUT_ERROR",
    "TRUNCATION",
    "LEARNED_RANKS",
    "TRUNCATED_ACTIVATIONS",
    "PERTURBED_RANKS",
    "FACTORS",
    "IPCA_MEMORY",
    "LOOK_UP",
    "TOP1",
    "QUESTIONS",
    "HEAD_VALUES",
    "HARNESS",
)
OF_SOME_MODELS = ("GGUF", "ONNX", "IMAGES", "IMAGE_TEXTS")
COMPRESSIONS = ("STATISTICS", "GRADIENTS", "SPECTRA", "COMPRESSION", "QUANTIZATION")


def current() -> dict[str, int]:
    """All of the above by name."""
    return {name: value for name, value in globals().items() if name.isupper() and isinstance(value, int)}


def used(components: Iterable[str]) -> dict[str, int]:
    """The versions that matter for a record whose model, compressions and evaluators name these ``components``.

    A report leaves out records of other versions.
    """
    left_out = {*OF_SOME_MODELS, *EVALUATORS, *COMPRESSIONS} - set(components)
    return {name: value for name, value in current().items() if name not in left_out}
