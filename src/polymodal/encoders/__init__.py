"""Media tensors to features: `vision` for pictures; its table `VISION_ENCODERS` names every family."""
