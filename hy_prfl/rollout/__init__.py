"""The denoising chain, walked with the pipeline's own sampler and stored for reuse, and the gradient of the reward."""
