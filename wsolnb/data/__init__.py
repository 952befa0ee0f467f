"""Data sets: one module each, one sample type, transforms that move image and truth together."""

from __future__ import annotations

from wsolnb.data.base import FolderDataset, LocalizationDataset, Subset, hold_out
from wsolnb.data.coco import COCO
from wsolnb.data.cub import CUB
from wsolnb.data.metadata_folder import MetadataFolder
from wsolnb.data.pets import OxfordPets
from wsolnb.data.readers import DATASETS, get_reader, open_dataset
from wsolnb.data.sample import CONTEXT, DISCRIMINATIVE, IGNORE, REST, Sample, tight_box
from wsolnb.data.tiny_imagenet import TinyImageNet
from wsolnb.data.voc import VOC
