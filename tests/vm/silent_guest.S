/* A guest that says one line on the serial port, and never answers: QEMU starts it by its PVH entry,
 * as it starts Linux. */
    .section .note.pvh, "a", @note
    .long 4, 4, 18 /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long _start

    .text
    .code32
    .globl _start
_start:
    cli
    mov $text, %esi
    mov $0x3f8, %dx
1:  lodsb
    test %al, %al
    jz 2f
    outb %al, %dx
    jmp 1b
2:
#ifdef ENDS
    /* No handler for any exception: the machine resets, which ends QEMU. */
    lidt nothing
    ud2
#endif
    hlt
    jmp 2b
nothing:
    .quad 0
text:
    .asciz "here is a guest that never answers\n"
