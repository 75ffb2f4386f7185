"""Convert a model folder to a .pth file for the original implementation (strict=True).

python convert/flax_to_torch.py --input FOLDER --output FILE.pth
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which take seconds
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from jaxvid import entry_point

    entry_point.run("convert.flax_to_torch")

import numpy as np
import torch

from jaxvid import parsers, remote
from jaxvid.atomic import output_path, replacing
from jaxvid.errors import InputError
from jaxvid.models import ModelConfig, Params, family_of, split_params
from jaxvid.storage import model_folder
from jaxvid.weights import rules


def to_state_dict(params: Params, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return the state_dict of the original implementation; tensors that it ignores are zeros."""
    state = {
        rules.torch_key(name): torch.from_numpy(
            np.array(rules.to_torch(name, np.asarray(array)), order="C")
        )
        for name, array in params.items()
    }
    for key, shape in family_of(config).torch.unused_shapes(config).items():
        if key not in state:
            state[key] = torch.zeros(shape)
    return state


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = parsers.convert_to_torch().parse_args(argv)
    try:
        model = model_folder.load_model(remote.complete_copy(args.input))
        state = to_state_dict(split_params(model)[1], model.config)
        tree = family_of(model.config).torch.wrap(state)
        output = output_path(args.output)
        try:
            with replacing(output) as partial:
                torch.save(tree, partial)
        except RuntimeError as error:  # e.g. there is no such folder
            raise InputError(
                f"{output} cannot be written ({error}); choose another file or free disk space"
            ) from None
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.EXIT_CODE
    print(f"{output}: {len(state)} tensors for the original implementation of {model.config.name}")
    return 0
