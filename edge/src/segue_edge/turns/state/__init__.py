"""What the edge does in one turn, whatever happens: signals in, instructions out. Pure.

signals   what a turn is told, and what it asks for
turn      the one into the other
parts     a plan's duties, the maker's state, the link that counts now
patience  how long a turn is without a cloud: pauses, going offline, giving up
shown     what readers have been shown
"""
