"""Step 1: build the long-tailed subset."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.DATA, install_kfp_package=False)
def build_subset(
    dataset: str,
    data_dir: str,
    shards_dir: str,
    imbalance_factor: float,
    profile: str,
    selection: str,
    class_order: str,
    subset_seed: int,
    validation_per_class: int,
    leakage: str,
    num_classes: int,
    image_size: int,
    test_per_class: int,
    short_side: int,
    storage: str,
    shard_mib: int,
    max_unreadable: float,
    subset: dsl.Output[dsl.Dataset],
) -> None:
    """Cut a long-tailed subset out of a source of images."""
    from pathlib import Path

    from components import boundary
    from shike_core import stages
    from shike_core.config import SubsetConfig

    with boundary.readable_errors():
        config = SubsetConfig(
            dataset=dataset,
            imbalance_factor=imbalance_factor,
            profile=profile,
            selection=selection,
            class_order=class_order,
            subset_seed=subset_seed,
            validation_per_class=validation_per_class,
            leakage=leakage,
            num_classes=num_classes,
            image_size=image_size,
            test_per_class=test_per_class,
            short_side=short_side,
            storage=storage,
            shard_mib=shard_mib,
            max_unreadable=max_unreadable,
        )
        report = stages.build_subset(
            config, data_dir or None, Path(subset.path), boundary.print_metrics, shards_dir
        )
        subset.metadata["digest"] = report["digest"]
        subset.metadata["images"] = report["sizes"]["train"]
