"""Conversion of decoded frames to upright RGB images."""

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import VideoReformatter

# Colour matrices are numbered as in the standard H.273. swscale refuses frames whose matrix is not
# in MATRICES, and uses BT.601 if it is UNSPECIFIED.
UNSPECIFIED = 2
MATRICES = (0, 1, 2, 4, 5, 6, 7, 9)
COLOR_MATRICES = ("tagged", "bt601")
# Steps that turn a frame upright → the clockwise rotation that they amount to. The steps are, in
# this order: exchange x and y, flip x, flip y. Other combinations also mirror the frame, except for
# (False, False, False), which leaves it unchanged.
TURNS = {(True, True, False): "90°", (False, True, True): "180°", (True, False, True): "270°"}


def to_rgb(
    frame: av.VideoFrame, reformatter: VideoReformatter, color_matrix: str
) -> tuple[np.ndarray, str]:
    """Convert a frame to RGB and turn it upright.

    Args:
        frame: A decoded frame.
        reformatter: Converter, which all frames of a video should share, because it computes its
            tables only once.
        color_matrix: `tagged`: the matrix in the frame's tag, or BT.601 if there is no tag or
            swscale does not support the matrix. `bt601`: always BT.601, as in the version of PyAV
            that STAM's original code used. The value range always follows the frame's tag.

    Returns:
        The image `(h, w, c)` uint8; and a description of the rotation or mirroring that made it
        upright (rotations are clockwise), or an empty string if none was needed.
    """
    if color_matrix == "bt601" or frame.colorspace not in MATRICES:
        frame.colorspace = UNSPECIFIED
    image = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    if (side_data := frame.side_data.get(SideDataType.DISPLAYMATRIX)) is None:
        return image, ""
    matrix = np.frombuffer(side_data, np.int32)  # x' = m0 x + m3 y, y' = m1 x + m4 y
    turned = bool(abs(matrix[[0, 4]]).min() < abs(matrix[[1, 3]]).min())
    flips = tuple((matrix[[3, 1]] if turned else matrix[[0, 4]]) < 0)  # of x', of y'
    if not turned and not any(flips):
        return image, ""
    turn = TURNS.get((turned, *flips))
    image = image.swapaxes(0, 1) if turned else image
    image = image[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1]
    return image, f"rotated by {turn}" if turn else "mirrored"
