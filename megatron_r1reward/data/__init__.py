"""From files on disk to token ids: readers, prompts, images, packing, loading and the embedded digits data set."""
