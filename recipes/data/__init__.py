"""Images as one uint8 tensor, drawn and augmented on the device a whole batch at a time.

The modules, in the order an image passes through them: `sources` reads files, `cache` keeps what was decoded, `plan`
says which image goes where in which batch, `augment` carries a plan out, `normalise` scales; `module.ImageData` is
all of it for a Trainer.
"""

from recipes.data.module import ImageData

__all__ = ["ImageData"]
