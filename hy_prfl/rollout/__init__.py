"""The denoising chain: walked with the pipeline's own sampler, with gradient through chosen steps, stored for reuse."""
