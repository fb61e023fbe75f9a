"""Text to image with FLUX.1, and the published models that systems on top of it share."""
