"""Cut the reference figures down to what fits into the repository.

    python tests/reference/make_small.py FULL.npz

The full file holds a network of three experts. Experts share the trunk and nothing else, so the
trunk with expert 0 alone (the one with two alignment steps) and its figures are a whole network of
one expert, exact to the last bit and within 2 MiB. Losses, gradients and learning rates stay whole.
"""

import re
import sys
from pathlib import Path

import numpy as np

SMALL = Path(__file__).with_name("shike_resnet32_c100_e3_small.npz")
OTHER_EXPERTS = re.compile(r"state\.(layer3s|shallow_exps|classifiers|rt_classifiers)\.[12]\.")
BY_EXPERT = (
    "features_eval",
    "logits_stage1_eval",
    "logits_stage2_eval",
    "logits_stage1_train",
)


def main(full: Path) -> None:
    with np.load(full) as arrays:
        kept = {name: arrays[name] for name in arrays.files if not OTHER_EXPERTS.match(name)}
    kept |= {name: kept[name][:1] for name in BY_EXPERT}
    np.savez_compressed(SMALL, **kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
