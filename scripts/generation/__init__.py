"""The generator: latents of a folder, what is known of them, the rectified flow that is learned on them, and samples of it."""
