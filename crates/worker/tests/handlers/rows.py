"""Works on rows, several in a line: each row's input says {"do": NAME, ...}. Answers with the line as it came unless told otherwise."""
import json
import os
import signal
import sys


def say(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def row(call, number):
    what = call["rows"][number]["input"]
    match what["do"]:
        case "echo":
            return {"result": {**call, "rows": call["rows"][number]}}
        case "count":
            return {"result": [len(call["rows"]), os.getpid()]}
        case "be":
            return what["answer"]
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "wait":
            # It reads what it is told meanwhile, and ends as it likes.
            print("it waits", file=sys.stderr, flush=True)
            return {"result": json.loads(sys.stdin.readline())["type"]}
        case "hang":
            open(what["file"], "w").close()
            while True:
                signal.pause()


for line in sys.stdin:
    call = json.loads(line)
    if call["type"] == "mark_done":
        context = call["context"] or {}
        if "error" in context:
            say(json.dumps({"type": "error", "id": call["id"], "error": context["error"], "wish": "retry"}))
        else:
            say(json.dumps({"type": "result", "id": call["id"], "result": call}))
    if call["type"] != "rows":
        continue
    inputs = [row["input"] for row in call["rows"]]
    answer = json.dumps({"type": "rows", "id": call["id"], "results": [row(call, n) for n in range(len(inputs))]})
    say(inputs[0].get("instead", answer).replace("$ID", str(call["id"])))
    if inputs[-1].get("afterwards") == "exit":
        sys.exit(0)
