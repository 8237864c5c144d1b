"""One torch thread: tensors in tests are small, and threads that wait for each other cost more than they give."""

import torch

torch.set_num_threads(1)
