#!/usr/bin/env python3
"""Checks exchange.pml with spin: exhaustively, under each kind of trouble, and once per way to break it, where the
property named must fail. Prints one line per search; exit code 1 if a search says what it should not.

check.py [--long]    --long: also combinations of troubles, minutes and gigabytes"""
import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile
import time

MODEL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "exchange.pml")
PROPERTIES = {  # as docs/protocol.md names them; 1 and 7 are searches, the others assertions
    1: "no state in which all wait", 2: "counted once", 3: "none lost", 4: "hosted or Nack",
    5: "old attempt forgotten", 6: "moves keep a host", 7: "progress under fairness",
}
SIGNS = {1: "invalid end state", 7: "non-progress cycle"}  # in pan's output; of assertions their number
HOLDS = [  # what may go wrong; here and below the long searches come first, so that two at a time end together
    "S=3 SERVER_DEATHS=1 STEPS=1", "SERVER_DEATHS=1 STEPS=1", "REPEATS=1", "LATE=1", "LOSSES=1", "GIVE_UP",
    "ROUTER_DEATHS=1", "",
]
PROGRESSES = ["LOSSES=1 STEPS=1", "STEPS=1"]
LONG = ["LOSSES=1 REPEATS=1 STEPS=1", "ROUTER_DEATHS=1 LATE=1 STEPS=1", "SERVER_DEATHS=1 ROUTER_DEATHS=1 STEPS=1",
        "LOSSES=1 LATE=1 STEPS=1", "LATE=2 STEPS=1"]
LONG_PROGRESSES = ["ROUTER_DEATHS=1 STEPS=1", "REPEATS=1 STEPS=1"]
BREAKS = [  # (how, the property that must fail, under what)
    ("BREAK_CREDIT", 1, ""), ("BREAK_DEADLINE", 1, "LOSSES=1 STEPS=1"), ("BREAK_BITMAP", 2, "LATE=1 STEPS=1"),
    ("BREAK_UNPLACED", 3, "STEPS=1"), ("BREAK_UNHOSTED", 4, "STEPS=1"), ("BREAK_NACK", 4, "STEPS=1"),
    ("BREAK_FORGETTING", 5, "LATE=1 STEPS=1"), ("BREAK_STALE", 5, "LATE=1 STEPS=1"), ("BREAK_MOVE", 6, "STEPS=1"),
    ("BREAK_NEWS", 7, "STEPS=1"),
]
MEMORY_MIB, LONG_MIB = 450, 8000  # of one search; two run at a time, of the long ones one


def search(defines, prop, broken, long):
    """Returns (what was found wrong or "", states, seconds). prop 0: all assertions and property 1."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-D" + d for d in defines.split()] + ["-DPROPERTY=%d" % prop]
        if prop == 7:
            flags.append("-DFAIR")
        begin = time.time()
        subprocess.run(["spin", "-a", *flags, MODEL], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        kind = ["-DNP", "-DNFAIR=4"] if prop == 7 else ["-DSAFETY", "-DNOFAIR"]
        # Compiling well takes longer than what is found at once.
        kind += ["-O2", "-DCOLLAPSE", "-DMEMLIM=%d" % LONG_MIB] if long else [
            "-O0" if broken else "-O1", "-DMEMLIM=%d" % MEMORY_MIB]
        subprocess.run(["gcc", "-w", *kind, "-o", "pan", "pan.c"], cwd=folder, check=True)
        # -E: not the states in which all wait; -A: not the assertions; -l -f: cycles without progress, weakly fair.
        options = {0: [], 1: ["-A"], 7: ["-l", "-f", "-A", "-E"]}.get(prop, ["-E"])
        sizes = ["-m1000000", "-w24"] if long else ["-m100000", "-w20"]
        text = subprocess.run(["./pan", *sizes, *options], cwd=folder, capture_output=True, text=True).stdout
    errors = re.search(r"errors: (\d+)", text)
    if not errors or (errors.group(1) == "0" and "Search not completed" in text):
        sys.exit("search of '%s' did not end:\n%s" % (defines, text[-2000:]))
    wrong = re.search(r"pan:\d+: (.*) \(at depth", text)
    states = int(float(re.search(r"([\d.e+]+) states, stored", text).group(1)))
    return wrong.group(1) if wrong else "", states, time.time() - begin


def main():
    long = "--long" in sys.argv[1:]
    jobs = [(d, 7, False) for d in PROGRESSES + (LONG_PROGRESSES if long else [])]
    jobs += [(d, 0, False) for d in HOLDS + (LONG if long else [])]
    jobs += [((how + " " + under).strip(), prop, True) for how, prop, under in BREAKS]
    bad = 0
    with concurrent.futures.ThreadPoolExecutor(1 if long else 2) as pool:
        runs = [pool.submit(search, d, prop, broken, long) for d, prop, broken in jobs]
        for (defines, prop, broken), run in zip(jobs, runs):
            wrong, states, seconds = run.result()
            good = re.search(SIGNS.get(prop, r"\(%d!=%d\)" % (prop, prop)), wrong) if broken else wrong == ""
            bad += not good
            if not good:
                print("found: %r" % wrong)
            print("%-6s %-42s %-9s %-28s %9d states %5.1f s" % (
                "ok" if good else "WRONG", defines or "no trouble", "fails:" if wrong else "holds:",
                PROPERTIES.get(prop, "1 to 6"), states, seconds), flush=True)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
