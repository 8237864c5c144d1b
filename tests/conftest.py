"""One torch thread: tensors in tests are small, and threads that wait for each other cost more than they give."""

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():  # before anybody imports Triton: without a GPU its programs are interpreted
    os.environ["TRITON_INTERPRET"] = "1"
