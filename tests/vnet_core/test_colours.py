from vnet_core.colours import COLOURS, rgb


def test_colours_by_hand():
    """Orange and sky blue as Okabe and Ito give them; after the seventh the first again."""
    assert (rgb(0), rgb(1)) == ((230, 159, 0), (86, 180, 233))
    assert len({rgb(i) for i in range(len(COLOURS))}) == len(COLOURS) == 7
    assert rgb(7) == rgb(0)
