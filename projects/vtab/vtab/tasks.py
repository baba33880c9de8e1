"""The tasks of VTAB-1k."""

GROUPS = dict(
    natural=dict(
        cifar=100,
        caltech101=102,
        dtd=47,
        oxford_flowers102=102,
        oxford_iiit_pet=37,
        svhn=10,
        sun397=397,
    ),
    specialized=dict(patch_camelyon=2, eurosat=10, resisc45=45, diabetic_retinopathy=5),
    structured=dict(
        clevr_count=8,
        clevr_dist=6,
        dmlab=6,
        kitti=4,
        dsprites_loc=16,
        dsprites_ori=16,
        smallnorb_azi=18,
        smallnorb_ele=9,
    ),
)
"""The number of classes of each task, by group, under the names that the folders have."""

TASKS = {task: classes for tasks in GROUPS.values() for task, classes in tasks.items()}
