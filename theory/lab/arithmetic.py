"""A stub."""

PRESET = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "max_steps": 20, "logging_steps": 1,
    "save_steps": 5, "generation_batch_size": 16, "num_generations": 4, "learning_rate": 5e-6,
    "max_completion_length": 128, "num_eval_problems": 4, "num_eval_generations": 4,
    "per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False,
}  # fmt: skip
