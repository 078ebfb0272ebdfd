"""For the tests of the guard: advice as good reflectors write it. None of it is a memory of anything.

`WRITTEN` is a list by hand, by category; `principles` writes more of the same kinds, keyed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

WRITTEN: dict[str, str] = {
    "mathematics": """
Check n = 1, 2, 3 before you claim a formula for all n.
Work modulo 10 when only the last digit is asked for, modulo 100 for the last two.
The angles of a triangle sum to 180 degrees, those of a quadrilateral to 360.
Use the identity a^2 - b^2 = (a - b)(a + b) before you multiply out.
If the discriminant b^2 - 4ac is negative, there is no real root.
For a fair coin each outcome has probability 1/2; for a die it is 1/6.
Sum an arithmetic series as n(n+1)/2 and check it with n = 4.
An integer is divisible by 3 or 9 if its digit sum is.
When a quantity is defined by cases, check the boundary between the cases before simplifying.
Always test small cases (n = 0, 1, 2) to catch off-by-one errors.
Convert percentages to fractions: 25% is 1/4, 50% is 1/2, 75% is 3/4.
A discount of 20% followed by one of 10% is not a discount of 30%.
Do not round before the last step; keep at least 4 decimal places until then.
When the problem asks for a remainder modulo 1000, reduce after every multiplication.
AIME answers are integers from 0 to 999; recheck anything outside this range.
Give fractions in lowest terms and write m + n only if the problem asks for it.
Use inclusion-exclusion when two or more conditions overlap.
Count ordered and unordered selections differently: divide by 2! or 3! where order does not matter.
The sum of two odd numbers is even, the product of two odd numbers is odd.
For a right triangle check whether it is a 3-4-5 or 5-12-13 triangle.
Express every quantity in the same unit, for example minutes, before adding; 1 hour is 60 minutes.
sin 30° = 1/2, cos 60° = 1/2 and tan 45° = 1.
A prime greater than 3 has the form 6k + 1 or 6k - 1.
Substitute your solution back into the original equation, squaring may add extraneous roots.
Use Vieta: the roots of x^2 - sx + p sum to s and multiply to p.
If a number ends in 0 or 5 it is divisible by 5.
Fermat's little theorem: a^(p-1) = 1 modulo p if p does not divide a.
Stars and bars: n identical objects into k boxes gives C(n + k - 1, k - 1) ways.
Use AM-GM only for non-negative numbers, and check when equality holds.
Define variables for every unknown and write one equation for every sentence.
A week has 7 days, a year 365 days or 52 weeks, a dozen is 12.
To find the area of a circle of radius r use πr^2, about 3.14 times r squared.
Compute 2^10 = 1024 and then scale, instead of multiplying ten times.
Draw a figure and label all given lengths before choosing a theorem.
Solve the linear system: eliminate y first, then substitute.
Find the expected value by linearity of expectation, not from the distribution.
Do not change any sign when you move a factor across the equation.
Distinguish "at least 3" from "more than 3".
When the question asks for how many more, subtract the smaller number from the larger one.
When speed changes, split the trip and add times, never average speeds.
Let x be the smallest of three consecutive integers, the others are x + 1 and x + 2.
""",
    "tools": """
Call the calculator for every product of numbers with more than 2 digits.
Write and run Python for brute force when there are fewer than 10^6 cases.
If a tool call fails twice, change the arguments instead of repeating it.
Print intermediate results, and read the error message before you edit the code.
Keep tool calls under 10 per problem.
Stop as soon as two independent methods agree.
Use list(range(1, 11)) to get the numbers from 1 to 10.
Read the file first; never overwrite it before you know what is in it.
Run ls -la before cd, and quote paths with spaces.
Limit output with head -n 20 when a file may be long.
Use grep -c to count matching lines and wc -l to count all of them.
Set a timeout of 5 seconds for loops that may not end.
""",
    "sql": """
Use COUNT(DISTINCT column) when rows may repeat after a join.
SELECT only the columns that are asked for, in the order of the question.
Use LEFT JOIN when rows without a match must be kept.
ORDER BY score DESC LIMIT 1 finds the highest; check for ties first.
GROUP BY every column that is not aggregated.
Filter groups with HAVING COUNT(*) > 1, rows with WHERE.
Compare text with LOWER() on both sides where the case is not known.
Look at the schema and at 3 sample rows before you write the query.
NULL is never equal to anything: write IS NULL.
Use BETWEEN 0 AND 100 for inclusive ranges.
A subquery with NOT IN fails on NULL values, use NOT EXISTS.
Join through the link table, never on names.
""",
    "search": """
Search for the entity first, then for the relation, one hop per query.
If the first 3 results do not contain the answer, rephrase the query with fewer words.
Give the shortest span that answers the question: a name, a date, a place.
Compare dates of birth to decide who is older.
When two people share a name, check the profession.
Answer yes or no when the question begins with is, are, was or did.
Use the official name of a person or place in queries.
Verify the answer in at least 2 passages before you reply.
Copy names exactly as the passage spells them.
For who questions answer with a person, for when with a year, for where with a place.
If passages disagree, trust the more specific one.
Do not answer from memory; search at least once.
For the population of a city or country prefer the latest census.
""",
    "code": """
Read the docstring examples and run them before you answer.
Handle the empty list, one element, and negative numbers.
Return the value; do not print it.
Keep the function signature exactly as given.
Use a set for membership tests on large lists.
Sort in O(n log n) instead of comparing all pairs.
Use integer division // when the result must be an int.
Beware of mutable default arguments.
Slices exclude the end index: a[0:3] has three elements.
Compare floats with a tolerance of 1e-9.
Check types with isinstance, bool is a subclass of int.
Do not change the input list while iterating over it.
Hidden tests may use large inputs; handle n = 0 and n = 10^5.
Read the expected output format twice and return exactly that.
Write your own tests for edge cases and run them before you submit.
Take results modulo 10**9 + 7 after every addition where the task says so.
""",
    "format": """
Put the final answer in a box and nothing after it.
Answer with a single integer, without units or commas.
Restate what is asked for before you start, and again before you answer.
Think step by step, but keep it under 200 words.
If you are unsure, check the answer with a second method.
Never leave the answer empty; give your best estimate.
Write fractions as a/b and not as decimals unless asked.
Do not round intermediate results; round the final result to 2 decimals.
Say yes or no first, then the reason.
End with one line that begins with Answer.
""",
    "micro": """
⊕ multiplies
⊗ adds
⊖ reverses
△ doubles
⋈ scales
☆ drains
▽ peaks
Apply operators from left to right, one numbered step at a time.
⊛ takes the larger of both numbers.
Use the calculator for every step and box the last value.
""",
    "games": """
Halve the range with every guess: start in the middle.
Open with a word of five different common letters.
Never guess a letter again that was marked as wrong.
Step back when two neighbours hide a trap.
Combine the largest numbers first, then adjust with the small ones.
To make 24, look for 3 times 8, 4 times 6 or 12 times 2.
Use every given number exactly once.
Keep a list of codes that are still possible.
If two cells are equally risky, take the one closer to the goal.
""",
}

TOPICS = (
    "a sum", "a product", "a ratio", "a percentage", "an equation", "a sequence", "a polynomial", "a triangle",
    "a circle",
    "a probability", "a counting problem", "a word problem", "an inequality", "a recurrence", "a matrix", "a graph",
    "a rate", "an average", "a query", "a loop", "a function", "a table", "a claim", "a proof",
)  # fmt: skip
CHECKS = (
    "substitute it back", "test it with n = {a}, {b} and {c}", "recompute it in another order",
    "estimate its size first",
    "check the units", "look for a symmetric case", "try the extreme values {a} and {d}", "verify it modulo {m}",
    "check the sign", "compare both sides for x = {a}", "count it again for a small case", "reduce it to lowest terms",
    "run it on {b} examples", "ask whether order matters", "look at the boundary", "split it into {b} cases",
)  # fmt: skip
SHAPES: dict[str, tuple[str, ...]] = {
    "mathematics": (
        "Before you answer on {topic}, {check}.", "When you simplify {topic}, {check}, then {check2}.",
        "Work modulo {m} and list the residues 0, 1, ..., {m1}.", "Use {a}x + {b} = {c} as a pattern: isolate x first.",
        "If n is divisible by {a} and by {b}, it is divisible by their least common multiple.",
        "A set of {d} elements has 2^{d} subsets; subtract the empty one if needed.",
        "For {topic} with {a} unknowns you need {a} independent equations.",
        "The ratio {a}:{b} means parts of {a}/{ab} and {b}/{ab}.", "Check divisibility by {a}, {b} and {c} first.",
        "There are {d}! ways to arrange {d} different objects.",
        "Convert {p}% to {p}/100 before you multiply.", "Expand (x + {a})^2 as x^2 + {a2}x + {aa}.",
    ),
    "tools": (
        "Use at most {d} tool calls for {topic}.", "After {b} failed calls, {check}.",
        "For loops of more than 10^{b} steps find a formula.", "Print at most {round} characters of any result.",
        "Set the precision to {d} digits and {check}.", "Retry {a} times, then report the error.",
    ),
    "sql": (
        "Add LIMIT {round} while you explore, and remove it at the end.", "Use HAVING COUNT(*) >= {a} for {topic}.",
        "Join {a} tables at most before you check the number of rows.", "Use ROUND(x, {a}) only in the last SELECT.",
        "Check for duplicates when a join returns more than {round} rows.",
    ),
    "search": (
        "Read the first {d} results before you search again.", "Use {b} to {d} keywords per query, no full sentences.",
        "For {topic} of dates, write the year with 4 digits.", "Stop after {d} searches and give the best candidate.",
        "Split the question into {a} hops and answer them in order.",
    ),
    "code": (
        "Test the function with 0, 1, {d} and an empty list.", "Avoid recursion deeper than {round} levels.",
        "Use range({a}, {d}) and remember that the end is excluded.",
        "Index from 0: the element number {b} has index {b1}.",
        "For {topic} choose an algorithm of O(n^{a}) only if n is at most {round}.",
    ),
    "format": (
        "Round to {a} decimal places only at the end.", "Keep the reasoning under {round} words.",
        "Write {a} sentences at most, then the answer.",
        "If asked for a multiple of {d}, check that your answer is one.",
        "When {topic} is asked for, name it in the last line; {check}.",
    ),
    "micro": ("{sign} {rule}", "{sign} {rule}; apply it after {sign2}", "first {sign}, then {sign2}"),
    "games": (
        "After {a} wrong guesses, halve what is left.",
        "With {d} candidates left, choose the one that splits them best.",
        "Try {a} times {b} and then add the rest.", "From cell ({a}, {b}) look at all neighbours before you step.",
        "Keep {a} turns in reserve.",
    ),
}  # fmt: skip
RULES = [
    "adds", "subtracts", "multiplies", "reverses", "doubles", "triples", "echoes", "trims", "drains", "peaks", "dips",
    "scales"
]


def principles(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """(category, text): the written ones first, then `count` in all."""
    written = [(kind, line) for kind, text in WRITTEN.items() for line in text.strip().splitlines()]
    yield from written[:count]
    draw = random.Random(seed)
    kinds = list(SHAPES)
    for number in range(count - len(written)):
        kind = kinds[number % len(kinds)]
        yield kind, _filled(draw.choice(SHAPES[kind]), draw)


def _filled(shape: str, draw: random.Random) -> str:
    a, b, c, d = sorted(draw.sample(range(2, 13), 4))
    values = {
        "a": a, "b": b, "c": c, "d": d, "b1": b - 1, "a2": 2 * a, "aa": a * a, "ab": a + b, "m": d, "m1": d - 1,
        "p": draw.choice([5, 10, 15, 20, 25, 30, 40, 50, 60, 75]),
        "round": draw.choice([10, 20, 50, 100, 200, 500, 1000]),
        "topic": draw.choice(TOPICS), "sign": draw.choice("⊕⊖⊗⊘⊙⊚⊛"), "sign2": draw.choice("⊞⊟⊠⋄⋆⋈△"),
        "rule": draw.choice(RULES),
    }  # fmt: skip
    first, second = draw.sample(CHECKS, 2)
    return shape.format(**values, check=first.format(**values), check2=second.format(**values))
