from uplvp_hf.labeling.processes import Processes
from uplvp_hf.labeling.progress import Progress


def test_process_0_speaks_of_its_share(capsys):
    processes = Processes()
    processes.size = 3
    assert Progress("labeling", 9, True, processes).line() == "labeling (process 1 of 3): 0 of 9 images"
    processes.rank = 1
    assert not Progress("labeling", 9, True, processes).shown
