from __future__ import annotations

import torch

# The models of the tests are tiny: threads that wait for each other cost ten times what they bring.
torch.set_num_threads(1)
