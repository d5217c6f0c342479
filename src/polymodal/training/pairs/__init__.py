"""Stages that learn from pairs of picture and text: CLIP, SigLIP, BLIP-2's first.

Read in this order: `recipe` (the file), `train` (what happens when), `records` and `pictures` (records to pairs),
`draws` (what is random, as pure functions), `data` (batches), `step` (one optimizer step), `run` (the loop's part),
`evaluate`, `export`. The loop, checkpoints, resume and report are those of every stage.
"""
