"""Wrong answers to the exercises of notebook 00."""

WRONG = {
    "0.1": {
        "three matrices": lambda hidden, neurons, layers: 2 * hidden * neurons * layers,
        "not one layer alone": lambda hidden, neurons, layers: 3 * hidden * neurons,
        "not only the rows": lambda hidden, neurons, layers: 3 * neurons * layers,
        "Look at the drawing": lambda hidden, neurons, layers: hidden * neurons * layers,
        "None.*return": lambda hidden, neurons, layers: print(end=""),
    },
}
