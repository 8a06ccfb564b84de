"""A handler of rows that does nothing: what is measured is the way to it and back."""
import json
import sys

for line in sys.stdin:
    call = json.loads(line)
    if call["type"] == "rows":
        print(json.dumps({"type": "rows", "id": call["id"], "results": [{} for _ in call["rows"]]}), flush=True)
