"""From any network's local features to seeds: one interface, 'features and classifier weights -> maps -> seed masks'.

    source = LiveFeatures(ConvExtractor(model), dataset)          # or FeatureDump(folder), or your own extractor
    prototypes = fit_prototypes(source, config, folder)           # goes on by class after an interruption
    for found in seed_maps(source, "lpcam", config, prototypes):  # or "cam", "lpcam-f"
        mask = seed_mask(found.maps, found.classes, threshold=0.3)

This module gathers the names that a host needs. They are defined elsewhere: sources in `wsolnb.methods.features`, LPCAM
over a data set in `wsolnb.methods.prototypes`, scores in `wsolnb.train.seeds`.
"""

from wsolnb.data.store import ClassMaps
from wsolnb.data.store import ClassMaps as SeedMaps
from wsolnb.methods.features import (
    ConvExtractor,
    Extractor,
    FeatureDump,
    FeatureSource,
    ImageFeatures,
    LiveFeatures,
    TokenExtractor,
    write_dump,
)
from wsolnb.methods.lpcam import LPCAMConfig
from wsolnb.methods.prototypes import (
    KINDS,
    ClassPrototypes,
    all_seed_maps,
    class_images,
    directions,
    directions_by_kind,
    fit_class,
    fit_prototypes,
    seed_maps,
    variant_maps,
)
from wsolnb.metrics import seed_mask
from wsolnb.train.seeds import REGIONS, THRESHOLDS, evaluate, has_masks, region_features, scored

__all__ = [
    "KINDS", "REGIONS", "THRESHOLDS", "ClassMaps", "ClassPrototypes", "ConvExtractor", "Extractor", "FeatureDump",
    "FeatureSource", "ImageFeatures", "LPCAMConfig", "LiveFeatures", "SeedMaps", "TokenExtractor", "all_seed_maps",
    "class_images", "directions", "directions_by_kind", "evaluate", "fit_class", "fit_prototypes", "has_masks",
    "region_features", "scored", "seed_maps", "seed_mask", "variant_maps", "write_dump",
]  # fmt: skip
