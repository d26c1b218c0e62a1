"""One trainer for every task, on Hugging Face Accelerate: one process, several, CPU or GPU."""

from regard.training.trainer import TrainConfig, TrainResult, evaluate, is_main_process, seeded, train

__all__ = ["TrainConfig", "TrainResult", "evaluate", "is_main_process", "seeded", "train"]
