// Section 2.2 of the article. Quoted: bpfSyscall, and Syscall6(SYS_BPF, cmd, fd, key, value, flags).
package snippet

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

func bpfSyscall(cmd, fd int, key, value unsafe.Pointer, flags uint64) error {
	_, _, errno := unix.Syscall6(unix.SYS_BPF, uintptr(cmd), uintptr(fd), uintptr(key),
		uintptr(value), uintptr(flags), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
