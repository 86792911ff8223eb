"""Fail unless a bench report shows speculation paying: python check_bench.py REPORT.json"""

import json
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    report = json.load(file)
best = max(row["speedup_vs_ar"] for row in report["summary"] if row["block_size"] != 1)
print(f"best speedup_vs_ar {best:.2f}")
sys.exit(0 if best > 1 else f"speedup_vs_ar must be above 1 but got {best:.2f}")
