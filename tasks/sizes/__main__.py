"""Which size of images each encoder takes, so that `prepare` runs again only where one of these has changed.

python -m tasks.sizes
"""

from __future__ import annotations

from typing import Any

from deepclust.errors import CheckpointError, ConfigError
from tasks.shared.operations.params import schema
from tasks.shared.operations.text import say
from tasks.shared.outputs import layout, stage


def main() -> None:
    """Run the stage."""
    with stage.running("sizes") as here:
        sizes = {encoder: size(here.params, encoder) for encoder in here.params.encoders}
        stage.write_text(here.folder / layout.SIZES.name, stage.json_text({"encoders": dict(sorted(sizes.items()))}))
        named = (f"{encoder} {found['image_size']}" for encoder, found in sizes.items())
        say(f"sides of images in pixels: {', '.join(named)}")


def size(params: schema.Params, encoder: str) -> dict[str, Any]:
    """What an encoder wants of its images.

    Returns:
        `image_size`, in pixels or auto, and `enlarged`: whether smaller images are brought to it before they are kept.
        For pretrained weights it is the encoder that enlarges images, for pixels nobody.

    Raises:
        ConfigError: If there is no such encoder, or the size is not valid.
        CheckpointError: If weights are missing or damaged.
    """
    method = params.method(encoder)
    if method == "pretrained":
        from deepclust.methods import pretrained

        options = params.options(encoder)
        assert isinstance(options, pretrained.Config)
        try:
            return {"image_size": pretrained.wanted_size(options), "enlarged": False}
        except (ConfigError, CheckpointError) as error:
            raise type(error)(f"pretrain.{encoder}: {error}") from error
    return {"image_size": params.image_size(encoder), "enlarged": method != "pixels"}


if __name__ == "__main__":
    main()
