"""VQAv2, GQA and TextVQA: short answers about photographs. Prompts as published for LLaVA-1.5 (arXiv:2310.03744)."""

TASKS = ()
