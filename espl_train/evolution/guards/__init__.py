"""What may become a principle, and which prompts may play. `Guard` judges texts; each module beside it does a part."""

from espl_train.evolution.guards.canary import Canary
from espl_train.evolution.guards.duplicates import Duplicates
from espl_train.evolution.guards.guard import Guard
from espl_train.evolution.guards.leaks import Leaks

__all__ = ["Canary", "Duplicates", "Guard", "Leaks"]
