import json, sys

answers, sys.stdout = sys.stdout, sys.stderr  # what print() says elsewhere is logged

def book(row):
    cents = row["input"]["cents"]
    if cents == 0:
        return {"status": "skipped"}
    if cents < 0:
        return {"status": "failed", "messages": [{"msgid": 7, "errcode": "negative", "field": "cents"}]}
    return {"result": {"booked": cents}, "files": {"booked.csv": f"{row['line']},{cents}"}}

def answer(row):
    try:
        return book(row)
    except Exception as error:
        return {"status": "failed", "error": repr(error)}

for line in sys.stdin:
    call = json.loads(line)
    if call["type"] == "rows":
        said = {"type": "rows", "id": call["id"], "results": [answer(row) for row in call["rows"]]}
    elif call["type"] == "mark_done":
        print("batch", call["batch"], "is", call["status"], call["counts"])
        said = {"type": "result", "id": call["id"]}
    else:
        continue  # a cancel that came too late
    print(json.dumps(said), file=answers, flush=True)
