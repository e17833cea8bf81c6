"""JPEG-LS, lossless JPEG and JPEG of 12 bits, in which clinics archive: pydicom has no decoders of its own for them.

A plugin for pydicom's decoders: https://pydicom.github.io/pydicom/stable/guides/decoding/decoder_plugins.html
"""

from __future__ import annotations

import imagecodecs
from pydicom import uid
from pydicom.pixels import get_decoder
from pydicom.pixels.decoders.base import DecodeRunner

_CODECS = {
    uid.JPEGExtended12Bit: imagecodecs.jpeg8_decode,
    uid.JPEGLossless: imagecodecs.jpegsof3_decode,
    uid.JPEGLosslessSV1: imagecodecs.jpegsof3_decode,
    uid.JPEGLSLossless: imagecodecs.jpegls_decode,
    uid.JPEGLSNearLossless: imagecodecs.jpegls_decode,
}
_END = b"\xff\xd9"  # the marker at the end of every JPEG and JPEG-LS


def register() -> None:
    """Make the codecs known to pydicom; once is enough."""
    for syntax in _CODECS:
        decoder = get_decoder(syntax)
        if "imagecodecs" not in decoder.available_plugins:
            decoder.add_plugin("imagecodecs", (__name__, "decode_frame"))


def is_available(syntax: str) -> bool:
    """What pydicom asks of a plugin."""
    return syntax in _CODECS


def decode_frame(content: bytes, runner: DecodeRunner) -> bytes:
    """What pydicom asks of a plugin: the values of one frame, colours pixel by pixel."""
    if runner.transfer_syntax == uid.JPEGExtended12Bit and runner.samples_per_pixel > 1:
        raise ValueError("12 bits in colour")
    if not content.rstrip(b"\0").endswith(_END):
        raise ValueError("cut off")  # which CharLS 2.4.3 can take many seconds to notice
    values = _CODECS[runner.transfer_syntax](content)
    runner.set_option("bits_allocated", 8 * values.itemsize)
    if runner.samples_per_pixel > 1:
        runner.set_option("planar_configuration", 0)
    pixels: bytes = values.tobytes()
    return pixels
