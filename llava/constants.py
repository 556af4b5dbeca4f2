"""Ids and strings that checkpoints, data files and upstream code agree on."""

IGNORE_INDEX = -100  # a label that no loss looks at
IMAGE_TOKEN_INDEX = -200  # stands for one image in input_ids; replaced by that image's features

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"

CONTROLLER_HEART_BEAT_EXPIRATION = 30
WORKER_HEART_BEAT_INTERVAL = 15
LOGDIR = "."
