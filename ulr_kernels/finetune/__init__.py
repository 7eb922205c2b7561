"""Fine-tuning of pre-trained language models in the memory of inference, and the logs that replay it."""
