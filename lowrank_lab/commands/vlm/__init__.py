"""The parts of ``lowrank_lab.commands.train_vlm``."""
