"""Makes a day of a bank, and checks what came of it, from the CSV alone: no code of Drayman's is used.

bank.py make DATABASE CSV COUNT       a database of accounts without money, and a CSV of transactions
bank.py told DATABASE BATCH           exit status 0 if the application was told that the batch is over
bank.py names FILES.jsonl             the names of the output files
bank.py check DATABASE CSV FOLDER ROWS.jsonl BATCH
"""
import csv
import json
import os
import random
import sqlite3
import sys

ACCOUNTS, BRANCHES = 2_000, 20


def make(database, path, count):
    bank = sqlite3.connect(database)
    bank.executescript(
        "create table accounts (id text primary key, balance integer not null);"
        "create table posted (batch text, line integer, primary key (batch, line)) without rowid;"
        "create table ended (batch text primary key, status text, done integer, failed integer);"
    )
    bank.executemany("insert into accounts values (?, 0)", [(f"a{n}",) for n in range(ACCOUNTS)])
    bank.commit()
    chance = random.Random(17)
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["account", "branch", "cents", "text"])
        for n in range(int(count)):
            account = f"a{chance.randrange(ACCOUNTS)}" if chance.random() > 0.001 else "nobody"
            cents = chance.randrange(-50_000, 50_001) if chance.random() > 0.002 else 0
            # A text with a line break: the lines of the file are not the rows.
            text = 'two\nlines, "quoted"' if n % 1_000 == 7 else f"transfer {n}"
            rows.writerow([account, chance.randrange(BRANCHES), cents, text])


def rows_of(path):
    """The transactions with the line of the file on which each begins."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        begins = rows.reader.line_num + 1 if rows.fieldnames is None else 2
        for row in rows:
            yield begins, row
            begins = rows.line_num + 1


def check(database, path, folder, exported, batch):
    balances = {f"a{n}": 0 for n in range(ACCOUNTS)}
    files, ends = {}, {}
    for line, row in rows_of(path):
        cents = int(row["cents"])
        if cents == 0:
            ends[line] = "skipped"
        elif row["account"] not in balances:
            ends[line] = "failed"
        else:
            ends[line] = "done"
            balances[row["account"]] += cents
            files.setdefault(f"branch-{row['branch']}.csv", []).append(f"{line},{row['account']},{cents}\n")
    bank = sqlite3.connect(database)
    faults = []
    found = dict(bank.execute("select id, balance from accounts"))
    wrong = [name for name in balances if balances[name] != found.get(name)]
    if wrong or len(found) != len(balances):
        faults.append(f"{len(wrong)} balances are wrong, such as {wrong[:3]}")
    if sorted(os.listdir(folder)) != sorted(files):
        faults.append(f"files are {sorted(os.listdir(folder))}, not {sorted(files)}")
    for name in files:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            if file.read() != "".join(files[name]):
                faults.append(f"{name} is wrong")
    with open(exported, encoding="utf-8") as file:
        rows = [json.loads(text) for text in file]
    if [row["line"] for row in rows] != sorted(ends):
        faults.append("the exported rows are not those of the file, in its order")
    elif any(row["status"] != ends[row["line"]] for row in rows):
        faults.append("exported rows have another status than they should")
    done = sum(end != "failed" for end in ends.values())
    ended = bank.execute("select status, done, failed from ended where batch = ?", (batch,)).fetchall()
    if ended != [("failed" if done < len(ends) else "done", done, len(ends) - done)]:
        faults.append(f"the application was told {ended}")
    for fault in faults:
        print(f"WRONG: {fault}", file=sys.stderr)
    if not faults:
        print(f"{len(ends)} transactions, {len(balances)} balances and {len(files)} files are exact")
    return 1 if faults else 0


def main(what, *arguments):
    if what == "make":
        make(*arguments)
    elif what == "told":
        found = sqlite3.connect(arguments[0]).execute("select 1 from ended where batch = ?", arguments[1:]).fetchall()
        return 0 if found else 1
    elif what == "names":
        with open(arguments[0], encoding="utf-8") as file:
            print(*(json.loads(text)["name"] for text in file), sep="\n")
    elif what == "check":
        return check(*arguments)
    else:
        sys.exit(__doc__)
    return 0


sys.exit(main(*sys.argv[1:]))
