import json, sys

for line in sys.stdin:
    job = json.loads(line)
    if job["type"] == "job":
        print(json.dumps({"type": "result", "id": job["id"], "result": "Hello, " + job["input"]}), flush=True)
