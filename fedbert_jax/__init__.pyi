from fedbert_jax.api import (
    STOP as STOP,
)
from fedbert_jax.api import (
    Config as Config,
)
from fedbert_jax.api import (
    Run as Run,
)
from fedbert_jax.api import (
    UserError as UserError,
)
from fedbert_jax.api import (
    compare_runs as compare_runs,
)
from fedbert_jax.api import (
    finetune_on_glue as finetune_on_glue,
)
from fedbert_jax.api import (
    load_config as load_config,
)
from fedbert_jax.api import (
    register_attack as register_attack,
)
from fedbert_jax.api import (
    register_channel as register_channel,
)

__version__: str

def register(name: str, *, clients: str, client: str, body: str, cut: bool = True) -> None: ...
def exit_on_interrupt() -> None: ...
