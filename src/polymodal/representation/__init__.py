"""What learns from pairs of picture and text: contrastive losses, two-tower models, the stages of BLIP-2."""
