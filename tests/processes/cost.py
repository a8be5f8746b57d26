import resource
import time
from tests.training import nano
def worker(rank, case):
    a=resource.getrusage(resource.RUSAGE_SELF)
    r=nano.train(rank, case)
    b=resource.getrusage(resource.RUSAGE_SELF)
    return {"status": r["status"], "before": [a.ru_utime,a.ru_stime,a.ru_minflt], "after": [b.ru_utime,b.ru_stime,b.ru_minflt]}
