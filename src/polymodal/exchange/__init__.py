"""Models in and out: published folders opened as ours, ours written as published ones, proof that both agree."""
