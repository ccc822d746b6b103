"""Where the numbers of metrics.jsonl go besides that file: `train.py --wandb` and `train.py --tensorboard`."""

import dataclasses
import functools


def start(config, first):
    """record(row) for the rows of metrics.jsonl from iteration `first` on: every number by its name, a nested one as
    group/name, with the iteration as the step.  Raises ValueError where wandb refuses."""
    logs = []
    if config.wandb:
        import wandb

        try:
            logs.append(wandb.init(project="apo", name=config.output_dir, config=dataclasses.asdict(config)).log)
        except Exception as error:  # nobody is logged in, no network
            raise ValueError(f"--wandb: {' '.join(str(error).split())}") from None
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        # Opened by the first row, when the folder is ours.  A resumed run takes back what lies after its checkpoint.
        writer = functools.cache(lambda: SummaryWriter(config.output_dir, purge_step=first))
        logs.append(lambda row, n: [*(writer().add_scalar(name, x, n) for name, x in row.items()), writer().flush()])

    def record(row):
        nested = {f"{name}/{key}": x for name, part in row.items() if isinstance(part, dict) for key, x in part.items()}
        for log in logs:
            log({name: x for name, x in (row | nested).items() if isinstance(x, (int, float))}, row["iteration"])

    return record
