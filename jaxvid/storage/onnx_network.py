"""ONNX files that `jaxvid export` has written, run by ONNX Runtime."""

from typing import TYPE_CHECKING

import numpy as np

from jaxvid.data.clips.transforms import to_uint8
from jaxvid.errors import InputError, import_or_explain, memory_problem, one_line

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

OUTPUTS = ("logits", "probabilities")


class OnnxNetwork:
    """An ONNX model with the input `clips` and the outputs `OUTPUTS`, on the CPU.

    Args:
        data: The contents of the file.
        name: Name of the file, for messages.
        num_threads: Threads per operator; None: chosen by ONNX Runtime, one per CPU core.

    Attributes:
        clip_shape: `(t, h, w, c)`.
        engine: Name and version of ONNX Runtime, and its execution provider.

    Raises:
        InputError: ONNX Runtime is not installed, or cannot load the model, or its input or outputs
            are different.
    """

    def __init__(self, data: bytes, name: str, num_threads: int | None = None):
        runtime = import_or_explain("onnxruntime", "jaxvid[onnx]", "ONNX files need")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = num_threads or 0  # 0: chosen by ONNX Runtime
        options.log_severity_level = 3  # errors; they are also raised
        # By default, int8 products overflow on CPUs that have AVX2 or AVX512, but not VNNI.
        options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            session = runtime.InferenceSession(data, options, ["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises many types
            if memory_problem(error):
                raise
            raise InputError(
                f"{name}: cannot be loaded by ONNX Runtime {runtime.__version__} "
                f"({one_line(error)}); export the model again"
            ) from None
        self._name, self._session = name, session
        self.clip_shape = self._check_signature(session)
        self.engine = f"onnxruntime {runtime.__version__} ({session.get_providers()[0]})"

    def _check_signature(self, session: "InferenceSession") -> tuple[int, ...]:
        """Return the shape of a clip; refuse a model with another input or other outputs."""
        inputs = [(value.name, value.type, len(value.shape)) for value in session.get_inputs()]
        outputs = tuple(value.name for value in session.get_outputs())
        if inputs != [("clips", "tensor(uint8)", 5)] or outputs != OUTPUTS:
            raise InputError(
                f"{self._name}: expected the input clips (b, t, h, w, c) uint8 and the outputs "
                f"{' and '.join(OUTPUTS)}; choose a file written by jaxvid export --format onnx"
            )
        return tuple(session.get_inputs()[0].shape[1:])

    def __call__(self, clips: np.ndarray) -> np.ndarray:
        """Map clips to logits.

        Args:
            clips: Pixels `(b, t, h, w, c)` as in evaluation. uint16 is rounded to uint8.

        Returns:
            `(b, num_classes)` float32.
        """
        return self._session.run([OUTPUTS[0]], {"clips": to_uint8(clips)})[0]
