"""Training: data, Trainer, learning rate, distillation."""
