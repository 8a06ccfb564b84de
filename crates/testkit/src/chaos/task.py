"""The tasks of a run, as a program that is given them or, with arguments, as a command for one.

Each tells what it does in a line of its own at the end of a file: the job, the attempt, `begun` or `done`, and the process
of its worker, which is its result too."""
import json
import os
import signal
import sys
import time

PATH = os.environ["CHAOS_EFFECTS"]
FILE = os.open(PATH, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
WORKER = os.getppid()


def work(job, attempt, task):
    """How it is to end: None if well."""
    os.write(FILE, f"{job} {attempt} begun {WORKER}\n".encode())
    time.sleep(task["ms"] / 1000)
    if task["deed"] == "poison":
        with open(PATH) as lines:
            killed = sum(line.startswith(f"{job} ") and " poison " in line for line in lines)
        if killed < task["most"]:
            os.write(FILE, f"{job} {attempt} poison {WORKER}\n".encode())
            os.kill(WORKER, signal.SIGKILL)
            time.sleep(60)
    if task["deed"] == "fail":
        return "fail"
    if task["deed"] == "once" and attempt == 1:
        return "retry"
    os.write(FILE, f"{job} {attempt} done {WORKER}\n".encode())
    return None


if len(sys.argv) > 1:
    _, job, attempt, task = sys.argv
    wish = work(job, int(attempt), json.loads(task))
    print("planned", file=sys.stderr)
    print(WORKER)
    sys.exit({None: 0, "fail": 3, "retry": 75}[wish])

def end_of(batch, attempt, row):
    """What becomes of a row of a batch."""
    n, deed = row["input"]["n"], row["input"]["deed"]
    os.write(FILE, f"row {batch} {n} {attempt} begun\n".encode())
    time.sleep(0.002)
    if deed == "exit" and attempt == 1:
        os._exit(7)
    if deed == "retry" and attempt == 1:
        return {"status": "retry", "after_ms": 50}
    if deed in ("fail", "skip"):
        return {"status": {"fail": "failed", "skip": "skipped"}[deed], "error": "planned"}
    return {"result": n, "files": {"odd/rows" if n % 2 else "even": str(row["line"])}}


for line in sys.stdin:
    call = json.loads(line)
    if call["type"] == "rows":
        results = [end_of(call["batch"], call["attempt"], row) for row in call["rows"]]
        print(json.dumps({"type": "rows", "id": call["id"], "results": results}), flush=True)
        continue
    if call["type"] == "mark_done":
        os.write(FILE, f"end {call['batch']} {call['status']}\n".encode())
        print(json.dumps({"type": "result", "id": call["id"]}), flush=True)
        continue
    if call["type"] != "job":
        continue
    wish = work(call["job"], call["attempt"], call["input"])
    if wish == "retry":
        os._exit(7)
    answer = {"type": "error", "error": "planned", "wish": wish} if wish else {"type": "result", "result": WORKER}
    print(json.dumps({**answer, "id": call["id"]}), flush=True)
