"""Does what its input says: {"do": NAME, ...}. Answers with its pid unless it is to do something worse."""
import json
import os
import signal
import subprocess
import sys
import time


def say(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def forever():
    while True:
        time.sleep(1000)


def behave(job):
    what = job["input"]
    if job["attempt"] >= what.get("good_at", sys.maxsize):
        return what["n"]
    match what["do"]:
        case "answer":
            return what["n"]
        case "gate":
            folder = os.environ["GATE"]
            open(f"{folder}/up-{what['n']}", "w").close()
            while not os.path.exists(f"{folder}/open"):
                time.sleep(0.02)
            return what["n"]
        case "echo":
            return job
        case "say":
            for line in what["lines"]:
                say(line.replace("$ID", str(job["id"])))
            if what.get("then") == "wait":
                forever()
            return None
        case "hang":
            if what.get("deaf"):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            say(json.dumps({"type": "progress", "id": job["id"], "done": os.getpid()}))
            forever()
        case "sleep":
            time.sleep(what["seconds"])
        case "exit":
            print("about to leave", file=sys.stderr, flush=True)
            os._exit(what["code"])
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "huge":
            while True:
                sys.stdout.write("x" * 65536)
        case "close":
            os.close(what["fd"])
            forever()
        case "deafen":
            os.close(0)
        case "fork":
            pipes = subprocess.DEVNULL if what.get("quiet") else None
            sleep = ["sleep", str(what.get("seconds", 1000))]
            child = subprocess.Popen(sleep, start_new_session=what["leaves"], stdin=pipes, stdout=pipes, stderr=pipes)
            if what.get("exit"):
                os._exit(3)
            return {"pid": os.getpid(), "child": child.pid}
        case "allocate":
            return len(bytearray(what["bytes"]))
        case "environment":
            return dict(os.environ)
        case "complain":
            for number in range(what["lines"]):
                print("line", number, file=sys.stderr)
            sys.stderr.flush()
    return {"pid": os.getpid()}


for line in sys.stdin:
    job = json.loads(line)
    if job["type"] != "job":
        continue
    try:
        result = behave(job)
        if result is not None:
            say(json.dumps({"type": "result", "id": job["id"], "result": result}))
    except Exception as error:
        say(json.dumps({"type": "error", "id": job["id"], "error": repr(error)}))
    if job["input"].get("afterwards") == "exit":
        sys.exit(0)
    if "afterwards" in job["input"]:
        say(job["input"]["afterwards"].replace("$ID", str(job["id"])))
