"""Evaluation benchmarks: small sets in the official layouts, and throughput beside a loop of one question at a time."""
