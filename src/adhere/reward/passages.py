"""Short texts that copy heads are measured on: several scripts, lengths and subjects, written for this purpose.

Each line is one passage. A model repeats sentences of it, so what matters is that no model has learned them by heart.
"""

from __future__ import annotations

import re

PASSAGES = (
    "The lighthouse on Kelm Point was built in 1887 by a shipowner named Tobias Raine. Its lamp burned whale oil "
    "until the winter of 1921. Two brothers from the nearby village kept the light for thirty years. They rowed "
    "out every morning with bread, coal and letters. When the harbour closed, the tower became a small museum of "
    "maps.",
    "Copper conducts heat better than iron, and iron better than glass. A pan with a copper base therefore warms "
    "quickly and evenly. Cooks polish it with salt and vinegar. The handle is usually made of steel, which stays "
    "cool much longer.",
    "Maria moved to Lisbon in March. She rents a room above a bakery near the river. Her neighbour repairs "
    "violins and never sleeps before midnight. On Sundays the two of them walk to the castle and count the trams.",
    "Glass frogs live in the rain forests of Central America. Their skin is so clear that the heart can be seen "
    "beating. At night the males guard the eggs, which hang from leaves above a stream. If a wasp comes close, "
    "the tadpoles can drop into the water early. Few animals of their size care for their young with such "
    "patience.",
    "Der Zug nach Bremen hatte zwanzig Minuten Verspätung. Auf dem Bahnsteig verkaufte eine Frau heiße Suppe. Ein"
    " alter Mann las laut aus der Zeitung vor. Schließlich kam die Durchsage, und alle stiegen langsam ein.",
    "Le petit marché ouvre chaque jeudi devant la mairie. On y vend du miel, des poires et du fromage de chèvre. "
    "Le boulanger arrive toujours le dernier, vers neuf heures. Quand il pleut, tout le monde se réfugie sous les"
    " arcades.",
    "La biblioteca del barrio cierra a las ocho de la tarde. En el segundo piso hay una sala llena de mapas "
    "antiguos. Los niños dibujan ríos y montañas con lápices azules. Una vez al mes, un geógrafo les cuenta sus "
    "viajes.",
    "Зимой озеро замерзает, и рыбаки ставят на льду палатки. Они сверлят лунки и ждут целый день. К вечеру над "
    "берегом поднимается дым от костров. Дети катаются на коньках до самой темноты.",
    "村口有一棵很老的樟树。夏天，老人们坐在树下喝茶下棋。孩子们把风筝挂在最高的树枝上。每年秋天，大家一起"
    "收集落叶做肥料。",
    "駅前の小さな店では、朝から晩まで味噌汁の香りがする。店主は毎朝四時に起きて豆腐を作る。近所の学生は帰"
    "り道に必ず立ち寄る。雨の日には、みんなが窓際の席に集まる。",
    "يفتح السوق القديم أبوابه مع شروق الشمس. يبيع التجار التوابل والأقمشة والفواكه المجففة. يجلس الحكواتي قرب "
    "الباب ويروي قصص البحارة. وفي المساء يعود الجميع إلى بيوتهم سيرا على الأقدام.",
    "गाँव के बीच में एक पुराना कुआँ है। सुबह औरतें वहाँ पानी भरने आती हैं। बच्चे पास के पेड़ पर झूला झूलते हैं। "
    "शाम को सब लोग चौपाल में बैठकर बातें करते हैं।",
)

_SENTENCE = re.compile(r"[^.。।]+[.。।]")


def repeated(passage: str) -> list[tuple[int, int]]:
    """Character spans of the two sentences that are repeated, the second and the last but one, with the blank before.

    >>> [PASSAGES[2][first:last] for first, last in repeated(PASSAGES[2])][0]
    ' She rents a room above a bakery near the river.'
    """
    spans = [found.span() for found in _SENTENCE.finditer(passage)]
    return [spans[1], spans[-2]]
